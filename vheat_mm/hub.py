"""The place of ``HubVHeat`` and ``HubVHeatClassifier`` before timm saved models for the Hugging Face Hub."""

raise ImportError(
    'vheat_mm.hub is gone: timm.models.save_for_hf and push_to_hf_hub save a model of timm.create_model, '
    "timm.create_model('local-dir:...' or 'hf-hub:...') builds it again, and vheat_mm.create_model(name, "
    "'FOLDER') loads what save_pretrained has written"
)
