_base_ = "./unet-tiny_1xb4-1k_scenes-96x192.py"
# min_kept as a share: at least 1/16 of the valid pixels of the batch (about 4600 of 4 x 96 x 192).
model = dict(
    decode_head=dict(loss_decode=dict(type="OhemCrossEntropyLoss", thresh=0.7, min_kept=1 / 16))
)
# The heads hand their small logits to the loss: same numbers, less time and memory.
custom_hooks = [dict(type="FusedOhemHook")]
