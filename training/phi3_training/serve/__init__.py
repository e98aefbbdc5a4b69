"""The local endpoint: a server that speaks the protocol of an Azure ML online endpoint."""
