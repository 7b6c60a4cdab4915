"""The only room that touches Megatron: patches, capture, checkpoint, process groups, CPU shim."""
