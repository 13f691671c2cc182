_base_ = [
    "../_base_/models/fast_scnn.py",
    "../_base_/datasets/cityscapes.py",
    "../_base_/default_runtime.py",
    "../_base_/schedules/schedule_160k.py",
]
crop_size = (512, 1024)
model = dict(
    data_preprocessor=dict(size=crop_size),
)
optim_wrapper = dict(optimizer=dict(lr=0.12, weight_decay=4e-5))
train_dataloader = dict(batch_size=4)
