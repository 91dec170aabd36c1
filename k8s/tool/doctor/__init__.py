"""Named checks of a cluster and a deployment, each with a fix. Reads only."""
