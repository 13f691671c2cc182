_base_ = "./efficientnet-lite0-frozen_segformer-head_1xb4-1k_camvid-240x320.py"
# min_kept: pixels per image (the sampler multiplies it by the batch size and pools the batch):
# 1/16 of the 240x320 frame, the same floor as the -ohem twin's when no pixel is ignored.
model = dict(
    decode_head=dict(
        sampler=dict(type="OHEMPixelSampler", thresh=0.7, min_kept=240 * 320 // 16),
    ),
)
