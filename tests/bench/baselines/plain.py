# What a sample does: two requests, no retry, no check; the baseline for azure-provisioning.py.
import http.client
import os
import xml.etree.ElementTree

HOST = os.environ['AZURE_PROVISIONING_WIRESERVER'].replace('http://', '')
HEADERS = {'x-ms-version': '2012-11-30', 'x-ms-agent-name': 'baseline'}


def ask(method, path, body=None, **headers):
    connection = http.client.HTTPConnection(HOST)
    connection.request(method, path, body, dict(HEADERS, **headers))
    return connection.getresponse().read()


state = xml.etree.ElementTree.fromstring(ask('GET', '/machine?comp=goalstate'))
report = xml.etree.ElementTree.Element('Health')
xml.etree.ElementTree.SubElement(report, 'GoalStateIncarnation').text = state.findtext(
    'Incarnation'
)
container = xml.etree.ElementTree.SubElement(report, 'Container')
xml.etree.ElementTree.SubElement(container, 'ContainerId').text = state.findtext(
    'Container/ContainerId'
)
role = xml.etree.ElementTree.SubElement(
    xml.etree.ElementTree.SubElement(container, 'RoleInstanceList'), 'Role'
)
xml.etree.ElementTree.SubElement(role, 'InstanceId').text = state.findtext(
    './/RoleInstance/InstanceId'
)
health = xml.etree.ElementTree.SubElement(role, 'Health')
xml.etree.ElementTree.SubElement(health, 'State').text = 'Ready'
ask(
    'POST',
    '/machine?comp=health',
    xml.etree.ElementTree.tostring(report),
    **{'Content-Type': 'text/xml;charset=utf-8'},
)
print('Ready')
