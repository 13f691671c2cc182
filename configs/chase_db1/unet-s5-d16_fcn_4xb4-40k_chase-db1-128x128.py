_base_ = [
    "../_base_/models/unet-s5-d16_fcn.py",
    "../_base_/datasets/chase_db1.py",
    "../_base_/default_runtime.py",
    "../_base_/schedules/schedule_40k.py",
]
crop_size = (128, 128)
model = dict(
    data_preprocessor=dict(size=crop_size),
)
train_dataloader = dict(batch_size=4)
