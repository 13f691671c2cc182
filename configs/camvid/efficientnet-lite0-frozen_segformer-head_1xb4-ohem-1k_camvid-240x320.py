_base_ = "./efficientnet-lite0-frozen_segformer-head_1xb4-1k_camvid-240x320.py"
# min_kept: 1/16 of the valid pixels of the batch, whatever the crop and the batch size.
model = dict(
    decode_head=dict(loss_decode=dict(type="OhemCrossEntropyLoss", thresh=0.7, min_kept=1 / 16)),
)
# The heads hand their small logits to the loss: same numbers, less time and memory.
custom_hooks = [dict(type="FusedOhemHook")]
