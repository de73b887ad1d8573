"""muomni trains an omni model (text, images and speech in; text and speech out) with DeepSpeed.

Importing the package is light on purpose: it pulls in neither torch nor DeepSpeed.
"""

__version__ = "0.1.0"
