checkpoint = "https://mmassets.onedl.ai/mmsegmentation/v0.5/ddrnet/pretrain/ddrnet23s-in1kpre_3rdparty-1ccac5b1.pth"
_base_ = [
    "../_base_/models/ddrnet-23-slim.py",
    "../_base_/datasets/cityscapes_1024x1024.py",
    "../_base_/default_runtime.py",
    "../_base_/schedules/schedule_120k.py",
]
crop_size = (1024, 1024)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(init_cfg=dict(type="Pretrained", checkpoint=checkpoint)),
)
train_dataloader = dict(batch_size=6)
randomness = dict(seed=304)
