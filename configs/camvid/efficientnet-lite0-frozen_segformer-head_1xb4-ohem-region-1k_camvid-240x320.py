_base_ = "./efficientnet-lite0-frozen_segformer-head_1xb4-1k_camvid-240x320.py"
# The loss of the -ohem twin, and Dice of each class present in the batch, 1 : 1.
model = dict(
    decode_head=dict(
        loss_decode=[
            dict(type="OhemCrossEntropyLoss", thresh=0.7, min_kept=1 / 16),
            dict(type="RegionLoss", kind="dice"),
        ],
    ),
)
# The heads hand their small logits to the loss: same numbers, less time and memory.
custom_hooks = [dict(type="FusedOhemHook")]
