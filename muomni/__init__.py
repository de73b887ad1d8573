"""muomni trains an omni model (text, images, and speech in; text and speech out) with DeepSpeed.

Importing it does not import torch or DeepSpeed.
"""

__version__ = "0.1.0"
