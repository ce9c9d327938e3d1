# An image of Debian 12, made by Packer on Azure. README.md tells how to use it.

packer {
  required_plugins {
    azure = {
      source  = "github.com/hashicorp/azure"
      version = "~> 2"
    }
  }
}

source "azure-arm" "debian" {
  use_azure_cli_auth                = true
  os_type                           = "Linux"
  image_publisher                   = "Debian"
  image_offer                       = "debian-12"
  image_sku                         = "12-gen2"
  location                          = "westeurope"
  vm_size                           = "Standard_B2s"
  ssh_username                      = "packer"
  managed_image_name                = "debian-12-azure-provisioning"
  managed_image_resource_group_name = "images"
}

build {
  sources = ["source.azure-arm.debian"]

  provisioner "file" {
    source      = "azure-provisioning.tar"
    destination = "/tmp/azure-provisioning.tar"
  }

  # bake.sh removes the user "packer", whose rule for sudo is gone by then: one sudo does it all.
  provisioner "shell" {
    script          = "../debian/bake.sh"
    execute_command = "sudo sh -euc 'tar -C / -xf /tmp/azure-provisioning.tar --no-same-owner --no-overwrite-dir; rm /tmp/azure-provisioning.tar; sh {{ .Path }} packer'"
    skip_clean      = true
  }
}
