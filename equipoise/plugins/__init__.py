"""The task's reward and prompts for other trainers: TRL, verl, OpenRLHF. Needs neither torch nor those libraries."""
