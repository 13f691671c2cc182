_base_ = "./segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py"
custom_imports = dict(imports=["ohem_mm"], allow_failed_imports=False)
# Cross-entropy over all valid pixels (mining off), and Dice of each class present in the batch, 1 : 1. The
# weights are those measured on CamVid, at a size for CPUs; at this size nothing was measured.
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
