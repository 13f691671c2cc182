_base_ = "./ocrnet_hr18_4xb2-80k_cityscapes-512x1024.py"
# mmengine replaces a list whole, so the list is rebuilt from the base's heads; each keeps its own
# loss_weight.
# min_kept: pixels per image (the sampler multiplies it by the batch size and pools the batch):
# 1/16 of the 512x1024 crop, the same floor as the -ohem twin's when no pixel is ignored.
sampler = dict(type="OHEMPixelSampler", thresh=0.7, min_kept=512 * 1024 // 16)
model = dict(
    decode_head=[dict(head, sampler=sampler) for head in _base_.model.decode_head],
)
del sampler
