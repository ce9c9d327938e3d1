#!/bin/sh
# The least that curl can do: the three requests of a run, and nothing with the replies.
curl -s -o /dev/null "${AZURE_PROVISIONING_WIRESERVER:?}/machine?comp=goalstate"
curl -s -o /dev/null --data '<Health/>' "$AZURE_PROVISIONING_WIRESERVER/machine?comp=health"
curl -s -o /dev/null \
    "${AZURE_PROVISIONING_IMDS:?}/metadata/instance/compute/osProfile/computerName?api-version=2021-02-01&format=text"
