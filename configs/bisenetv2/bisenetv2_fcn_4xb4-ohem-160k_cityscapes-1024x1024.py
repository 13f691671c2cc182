_base_ = "./bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py"
custom_imports = dict(imports=["ohem_mm"], allow_failed_imports=False)
# mmengine replaces a list whole, so the list is rebuilt from the base's heads; each keeps its own
# loss_weight.
# min_kept: 1/16 of the valid pixels of the batch, whatever the crop and the batch size.
ohem = dict(type="OhemCrossEntropyLoss", thresh=0.7, min_kept=1 / 16)
model = dict(
    decode_head=dict(loss_decode=ohem),
    auxiliary_head=[
        dict(head, loss_decode=dict(head.loss_decode, **ohem))
        for head in _base_.model.auxiliary_head
    ],
)
del ohem
# The heads hand their small logits to the loss: same numbers, less time and memory.
custom_hooks = [dict(type="FusedOhemHook")]
