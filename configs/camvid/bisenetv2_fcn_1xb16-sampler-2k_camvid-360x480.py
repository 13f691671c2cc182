_base_ = "./bisenetv2_fcn_1xb16-2k_camvid-360x480.py"
# mmengine replaces a list whole, so the list is rebuilt from the base's heads.
# min_kept: pixels per image (the sampler multiplies it by the batch size and pools the batch):
# 1/16 of the 360x480 crop, the same floor as the -ohem twin's when no pixel is ignored.
sampler = dict(type="OHEMPixelSampler", thresh=0.7, min_kept=360 * 480 // 16)
model = dict(
    decode_head=dict(sampler=sampler),
    auxiliary_head=[dict(head, sampler=sampler) for head in _base_.model.auxiliary_head],
)
del sampler
