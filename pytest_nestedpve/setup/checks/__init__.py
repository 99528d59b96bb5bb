"""What has to be true of an outer host, as checks: preflight fails by them, the doctor prints them."""
