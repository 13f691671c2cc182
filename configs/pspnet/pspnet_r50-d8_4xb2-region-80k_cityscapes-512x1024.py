_base_ = "./pspnet_r50-d8_4xb2-80k_cityscapes-512x1024.py"
custom_imports = dict(imports=["ohem_mm"], allow_failed_imports=False)
# Cross-entropy over all valid pixels (mining off), and Dice of each class present in the batch, 1 : 1. The
# weights are those measured on CamVid, at a size for CPUs; at this size nothing was measured.
ce = dict(type="OhemCrossEntropyLoss", thresh=None, min_kept=1.0, loss_name="loss_ce")
dice = dict(type="RegionLoss", kind="dice")
model = dict(
    decode_head=dict(loss_decode=[ce, dice]),
    auxiliary_head=dict(
        loss_decode=[dict(ce, loss_weight=0.4), dict(dice, loss_weight=0.4)],
    ),
)
del ce, dice
# The heads hand their small logits to the loss: same numbers, less time and memory.
custom_hooks = [dict(type="FusedOhemHook")]
