checkpoint = (
    "https://mmassets.onedl.ai/mmsegmentation/v0.5/pretrain/segformer/mit_b0_20220624-7e0fe6dd.pth"
)
_base_ = [
    "../_base_/models/segformer_mit-b0.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/default_runtime.py",
    "../_base_/schedules/schedule_160k_adamw.py",
]
crop_size = (512, 512)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(init_cfg=dict(type="Pretrained", checkpoint=checkpoint)),
    decode_head=dict(num_classes=150),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={"pos_block": dict(decay_mult=0.0), "head": dict(lr_mult=10.0)},
    ),
)
train_dataloader = dict(batch_size=2)
