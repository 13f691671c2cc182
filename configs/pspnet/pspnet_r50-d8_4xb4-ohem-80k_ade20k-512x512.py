_base_ = "./pspnet_r50-d8_4xb4-80k_ade20k-512x512.py"
custom_imports = dict(imports=["ohem_mm"], allow_failed_imports=False)
# min_kept: 1/16 of the valid pixels of the batch, whatever the crop and the batch size.
ohem = dict(type="OhemCrossEntropyLoss", thresh=0.7, min_kept=1 / 16)
model = dict(
    decode_head=dict(loss_decode=ohem),
    auxiliary_head=dict(loss_decode=ohem),
)
del ohem
# The heads hand their small logits to the loss: same numbers, less time and memory.
custom_hooks = [dict(type="FusedOhemHook")]
