_base_ = "./deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py"
# min_kept: pixels per image (the sampler multiplies it by the batch size and pools the batch):
# 1/16 of the 512x512 crop, the same floor as the -ohem twin's when no pixel is ignored.
sampler = dict(type="OHEMPixelSampler", thresh=0.7, min_kept=512 * 512 // 16)
model = dict(
    decode_head=dict(sampler=sampler),
    auxiliary_head=dict(sampler=sampler),
)
del sampler
