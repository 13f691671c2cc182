_base_ = "./unet-tiny_1xb4-1k_scenes-96x192.py"
# The sampler counts min_kept per image: 96 * 192 / 16 pixels, the same floor as in the -ohem twin.
model = dict(
    decode_head=dict(sampler=dict(type="OHEMPixelSampler", thresh=0.7, min_kept=96 * 192 // 16))
)
