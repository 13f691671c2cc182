_base_ = "./unet-thin_fcn_1xb4-1k_chase-db1-128x128.py"
# min_kept: pixels per image (the sampler multiplies it by the batch size and pools the batch):
# 1/16 of the 128x128 crop, the same floor as the -ohem twin's when no pixel is ignored.
model = dict(
    decode_head=dict(
        sampler=dict(type="OHEMPixelSampler", thresh=0.7, min_kept=128 * 128 // 16),
    ),
)
