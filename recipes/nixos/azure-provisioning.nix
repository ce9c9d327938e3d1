# A module of NixOS. Import it, and leave waagent and cloud-init off.
{ pkgs, ... }:
let
  files = pkgs.runCommand "azure-provisioning" { } ''
    install -D -m 755 ${../../azure-provisioning.sh} $out/bin/azure-provisioning
    install -D -m 644 ${../../azure-provisioning.service} $out/lib/systemd/system/azure-provisioning.service
  '';
in {
  # Where it is empty, NixOS writes no /etc/hostname.
  networking.hostName = "";

  systemd.packages = [ files ];
  systemd.services.azure-provisioning = {
    wantedBy = [ "multi-user.target" ];
    path = [ pkgs.curl pkgs.hostname ];
    serviceConfig = {
      # Units are generated here, so that "disable" would fail: "remember" takes its place.
      ExecStart = [ "" "${files}/bin/azure-provisioning ready hostname remember" ];
      StateDirectory = "azure-provisioning";

      # hostnamectl refuses to set the hostname here. The program sets it itself.
      ReadWritePaths = "/etc";
      ProtectHostname = false;
      PrivateUsers = false;
      CapabilityBoundingSet = "CAP_SYS_ADMIN";
      SystemCallFilter = "sethostname";
    };
  };
}
