"""What users call: models by name, training and testing from the command line, the Hub, the environment check."""

from vheat_mm.apis.explain import explain_backends
from vheat_mm.apis.inference.predictor import Predictor
from vheat_mm.apis.model_zoo import create_model, list_models

__all__ = ['Predictor', 'create_model', 'explain_backends', 'list_models']
