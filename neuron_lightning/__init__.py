"""PyTorch Lightning for AWS Trainium and Inferentia."""
