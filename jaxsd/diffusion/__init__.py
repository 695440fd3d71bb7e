"""The diffusion process: schedules, guidance, samplers; knows the network only as a callable."""
