"""What models are given beside text: items, pictures, sound, and what encoders made of them."""
