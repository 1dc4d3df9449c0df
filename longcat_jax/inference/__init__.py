"""Running a trained model: full passes, the latent cache, sampling."""
