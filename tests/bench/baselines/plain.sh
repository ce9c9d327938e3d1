#!/bin/sh
# What a sample does: two requests, no retry, no check; the baseline for azure-provisioning.sh.
url=${AZURE_PROVISIONING_WIRESERVER:?}
state=$(curl -s -H 'x-ms-version: 2012-11-30' -H 'x-ms-agent-name: baseline' "$url/machine?comp=goalstate")
text() { # ELEMENT: the text of the first one
    printf '%s\n' "$state" | grep -o "<$1>[^<]*" | sed -n "1s/<$1>//p"
}
report="<Health><GoalStateIncarnation>$(text Incarnation)</GoalStateIncarnation><Container>\
<ContainerId>$(text ContainerId)</ContainerId><RoleInstanceList><Role><InstanceId>$(text InstanceId)</InstanceId>\
<Health><State>Ready</State></Health></Role></RoleInstanceList></Container></Health>"
curl -s -H 'x-ms-version: 2012-11-30' -H 'x-ms-agent-name: baseline' -H 'Content-Type: text/xml;charset=utf-8' \
    --data "$report" "$url/machine?comp=health"
echo Ready
