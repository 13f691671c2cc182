_base_ = "./segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py"
custom_imports = dict(imports=["ohem_mm"], allow_failed_imports=False)
# min_kept: 1/16 of the valid pixels of the batch, whatever the crop and the batch size.
model = dict(
    decode_head=dict(
        loss_decode=dict(type="OhemCrossEntropyLoss", thresh=0.7, min_kept=1 / 16),
    ),
)
# The heads hand their small logits to the loss: same numbers, less time and memory.
custom_hooks = [dict(type="FusedOhemHook")]
