_base_ = "./pspnet_r50-d8_4xb2-80k_cityscapes-512x1024.py"
# min_kept: pixels per image (the sampler multiplies it by the batch size and pools the batch):
# 1/16 of the 512x1024 crop, the same floor as the -ohem twin's when no pixel is ignored.
sampler = dict(type="OHEMPixelSampler", thresh=0.7, min_kept=512 * 1024 // 16)
model = dict(
    decode_head=dict(sampler=sampler),
    auxiliary_head=dict(sampler=sampler),
)
del sampler
