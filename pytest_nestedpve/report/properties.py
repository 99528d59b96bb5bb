"""Names of the user properties of a test that ran phases; reports show them."""

PROPERTY_PHASE = "nested_pve_phase"
PROPERTY_SECONDS = "nested_pve_seconds"
PROPERTY_STATUS = "nested_pve_status"
PROPERTY_DONE_BY = "nested_pve_done_by"
