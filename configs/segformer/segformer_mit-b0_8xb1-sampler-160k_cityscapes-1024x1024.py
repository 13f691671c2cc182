_base_ = "./segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py"
# min_kept: pixels per image (the sampler multiplies it by the batch size and pools the batch):
# 1/16 of the 1024x1024 crop, the same floor as the -ohem twin's when no pixel is ignored.
model = dict(
    decode_head=dict(
        sampler=dict(type="OHEMPixelSampler", thresh=0.7, min_kept=1024 * 1024 // 16),
    ),
)
