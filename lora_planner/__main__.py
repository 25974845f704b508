from lora_planner.cli import main

main()
