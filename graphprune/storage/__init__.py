"""Programs and artifacts as folders of JSON and safetensors."""
