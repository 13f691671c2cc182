# EfficientNet-Lite0 as it comes from ImageNet, not trained, under SegFormer's all-MLP head. Its feature
# maps are kept on disk, 0.5 MB for an image of 240x320, so that training costs the head alone.
_base_ = "./efficientnet-lite0_segformer-head.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="FrozenBackbone",
        backbone=dict(_base_.model.backbone, out_indices=(1, 2, 3, 4)),
        cache_dir="work_dirs/features",
    ),
    decode_head=dict(in_index=[0, 1, 2, 3]),
)
