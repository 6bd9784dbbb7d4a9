"""What runs on the device, in Triton."""
