"""What tests share: tiny models, configs of every family, run folders made by hand, and the toy run."""
