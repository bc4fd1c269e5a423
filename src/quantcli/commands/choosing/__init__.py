"""What fits a device: devices and their formats, memory of weights and caches, costs, the order.

`commands/recommend.py` puts it together. Figures come from headers and config.json; no weight is read.
"""
