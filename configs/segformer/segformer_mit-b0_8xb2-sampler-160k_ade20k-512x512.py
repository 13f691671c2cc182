_base_ = "./segformer_mit-b0_8xb2-160k_ade20k-512x512.py"
# min_kept: pixels per image (the sampler multiplies it by the batch size and pools the batch):
# 1/16 of the 512x512 crop, the same floor as the -ohem twin's when no pixel is ignored.
model = dict(
    decode_head=dict(
        sampler=dict(type="OHEMPixelSampler", thresh=0.7, min_kept=512 * 512 // 16),
    ),
)
