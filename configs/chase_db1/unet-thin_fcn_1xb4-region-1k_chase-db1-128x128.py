_base_ = "./unet-thin_fcn_1xb4-1k_chase-db1-128x128.py"
# Cross-entropy over all valid pixels (mining off), and Dice of each class present in the batch, 1 : 1. The
# weights are those measured on CamVid.
model = dict(
    decode_head=dict(
        loss_decode=[
            dict(type="OhemCrossEntropyLoss", thresh=None, min_kept=1.0, loss_name="loss_ce"),
            dict(type="RegionLoss", kind="dice"),
        ],
    ),
)
# The heads hand their small logits to the loss: same numbers, less time and memory.
custom_hooks = [dict(type="FusedOhemHook")]
