//! What stands for a machine's disks and network interfaces on this host: only what the receiver was told to open, whatever a
//! peer names.

use std::path::{Path, PathBuf};

use godwit_core::Refusal;

use super::HostOptions;
use crate::config::{DiskConfig, MachineConfig, NetConfig};

/// The machine's definition as it holds here, or every reason why there is none.
pub(crate) fn find(config: &MachineConfig, options: &HostOptions) -> Result<MachineConfig, Vec<Refusal>> {
    let mut here =
        MachineConfig { serial: options.serial.clone(), unsafe_cache: options.unsafe_cache, ..config.clone() };
    let mut refusals = Vec::new();
    for disk in &mut here.disks {
        match disk_path(disk, options) {
            Ok(path) => disk.path = path,
            Err(reason) => refusals.push(Refusal::new(format!("disk {}", disk.id), reason)),
        }
    }
    for net in &mut here.nets {
        match tap(net, options) {
            Ok(tap) => net.tap = tap,
            Err(reason) => refusals.push(Refusal::new(format!("net {}", net.id), reason)),
        }
    }
    if refusals.is_empty()
        && let Err(error) = here.validate()
    {
        // Two of the machine's disks may be one file here.
        refusals.push(Refusal::new("machine", error.to_string()));
    }
    if refusals.is_empty() { Ok(here) } else { Err(refusals) }
}

fn disk_path(disk: &DiskConfig, options: &HostOptions) -> Result<PathBuf, String> {
    if let Some(path) = options.map_disks.get(&disk.id) {
        return Ok(path.clone());
    }
    let (id, path) = (&disk.id, disk.path.display());
    let missing = |error| format!("{path} cannot be found: {error} (is the share mounted here?)");
    let real = disk.path.canonicalize().map_err(missing)?;
    let allowed = |folder: &PathBuf| Path::canonicalize(folder).is_ok_and(|folder| real.starts_with(folder));
    if options.disk_dirs.iter().any(allowed) {
        return Ok(disk.path.clone());
    }
    Err(format!(
        "{path} lies in no folder from which this host lets a machine open disks (--disk-dir, or --map-disk {id}=PATH)"
    ))
}

/// The tap that stands for the source's here, if it may be opened.
pub(super) fn tap(net: &NetConfig, options: &HostOptions) -> Result<String, String> {
    if let Some(tap) = options.map_nets.get(&net.id) {
        return Ok(tap.clone());
    }
    let NetConfig { id, tap, .. } = net;
    if options.allow_taps.contains(tap) {
        return Ok(tap.clone());
    }
    Err(format!("the tap {tap} is none that this host lets a machine use (--allow-tap {tap}, or --map-net {id}=TAP)"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::config::GuestKind;

    fn machine(path: &Path) -> MachineConfig {
        MachineConfig {
            guest: Some(GuestKind::Writer),
            disks: vec![DiskConfig { id: "root".into(), path: path.into(), readonly: false }],
            nets: vec![NetConfig { id: "lan".into(), tap: "tap0".into(), mac: "52:54:00:00:00:01".into() }],
            ..Default::default()
        }
    }

    #[test]
    fn only_what_the_receiver_was_told_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let (open, closed) = (folder.path().join("open"), folder.path().join("closed"));
        for path in [&open, &closed] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("image"), b"").unwrap();
        }
        symlink(closed.join("image"), open.join("link")).unwrap();
        let options =
            HostOptions { disk_dirs: vec![open.clone()], allow_taps: vec!["tap0".into()], ..Default::default() };
        assert_eq!(find(&machine(&open.join("image")), &options).unwrap().disks[0].path, open.join("image"));
        for path in [closed.join("image"), open.join("link"), open.join("../closed/image"), open.join("missing")] {
            let refusals = find(&machine(&path), &options).unwrap_err();
            assert!(refusals.iter().any(|refusal| refusal.to_string().contains("disk root: ")), "{refusals:?}");
        }
        let reasons = find(&machine(&closed.join("image")), &HostOptions::default()).unwrap_err();
        assert_eq!(reasons.len(), 2, "the tap, too: {reasons:?}");
    }

    #[test]
    fn what_is_called_differently_here_is_taken_from_the_map() {
        let options = HostOptions {
            map_disks: [("root".into(), "/srv/root".into())].into(),
            map_nets: [("lan".into(), "tap9".into())].into(),
            ..Default::default()
        };
        let here = find(&machine(Path::new("/nonexistent")), &options).unwrap();
        assert_eq!((here.disks[0].path.as_path(), here.nets[0].tap.as_str()), (Path::new("/srv/root"), "tap9"));
        let mut two = machine(Path::new("/nonexistent"));
        two.disks.push(DiskConfig { id: "data".into(), path: "/other".into(), readonly: false });
        let options =
            HostOptions { map_disks: [("root".into(), "/a".into()), ("data".into(), "/a".into())].into(), ..options };
        assert!(find(&two, &options).unwrap_err()[0].to_string().contains("one file"));
    }
}
