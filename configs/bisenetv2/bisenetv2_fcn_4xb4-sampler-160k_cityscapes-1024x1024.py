_base_ = "./bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py"
# mmengine replaces a list whole, so the list is rebuilt from the base's heads; each keeps its own
# loss_weight.
# min_kept: pixels per image (the sampler multiplies it by the batch size and pools the batch):
# 1/16 of the 1024x1024 crop, the same floor as the -ohem twin's when no pixel is ignored.
sampler = dict(type="OHEMPixelSampler", thresh=0.7, min_kept=1024 * 1024 // 16)
model = dict(
    decode_head=dict(sampler=sampler),
    auxiliary_head=[dict(head, sampler=sampler) for head in _base_.model.auxiliary_head],
)
del sampler
