"""The fp8 format of Hugging Face: 128 x 128 blocks, or one scale for each weight."""
