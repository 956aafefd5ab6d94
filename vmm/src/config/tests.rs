//! Tests of machine files.

use proptest::prelude::*;

use super::*;

/// A file with every key of this version, and what it means.
const FULL: &str = r#"
name = "web-1"
memory = "2G"
memory_backing = "memfd"
huge_pages = true
vcpus = 4
kernel = "/boot/vmlinuz"
initrd = "/boot/initrd.img"
cmdline = "console=ttyS0 root=/dev/vda1"
serial = "unix:/run/web-1.serial"
dirty_tracking = "bitmap"

[balloon]
free_page_reporting = false
"#;

fn parse(text: &str) -> Result<MachineConfig, ConfigError> {
    MachineConfig::from_toml(text, "m.toml").and_then(|config| config.validate().map(|()| config))
}

#[test]
fn every_key_is_read() {
    let config = parse(FULL).unwrap();
    let expected = MachineConfig {
        name: "web-1".into(),
        memory: ByteSize(2 << 30),
        memory_backing: MemoryBacking::Memfd,
        huge_pages: true,
        vcpus: 4,
        kernel: Some("/boot/vmlinuz".into()),
        initrd: Some("/boot/initrd.img".into()),
        cmdline: "console=ttyS0 root=/dev/vda1".into(),
        serial: SerialTarget::Unix("/run/web-1.serial".into()),
        dirty_tracking: DirtyTracking::Bitmap,
        guest: None,
        writer: None,
        unsafe_cache: false,
        balloon: Some(BalloonConfig { free_page_reporting: false }),
        disks: Vec::new(),
        nets: Vec::new(),
    };
    assert_eq!(config, expected);
}

#[test]
fn a_balloon_that_is_there_is_told_of_free_pages() {
    let balloon = |text: &str| parse(&format!("guest = \"writer\"\n{text}")).unwrap().balloon;
    assert_eq!(balloon("[balloon]"), Some(BalloonConfig { free_page_reporting: true }));
    assert_eq!(balloon(""), None);
}

#[test]
fn what_is_left_out_has_defaults() {
    assert_eq!(
        parse("guest = \"writer\"").unwrap(),
        MachineConfig { guest: Some(GuestKind::Writer), ..Default::default() }
    );
}

#[test]
fn a_definition_reads_back() {
    let writer = MachineConfig {
        guest: Some(GuestKind::Writer),
        writer: Some(WriterConfig { rate: crate::workload::Rate::Max, ..Default::default() }),
        ..Default::default()
    };
    let with_devices = MachineConfig {
        disks: vec![DiskConfig { id: "root".into(), path: "/srv/root.img".into(), readonly: true }],
        nets: vec![NetConfig { id: "n0".into(), tap: "tap0".into(), mac: "52:54:00:00:00:01".into() }],
        ..writer.clone()
    };
    for config in [parse(FULL).unwrap(), writer, with_devices] {
        let text = config.to_toml().unwrap();
        assert_eq!(MachineConfig::from_toml(&text, "shown").unwrap(), config, "{text}");
    }
}

#[test]
fn errors_name_the_file_the_key_and_what_would_do() {
    let cases = [
        ("memry = \"2G\"", "m.toml, line 1 (`memry = \"2G\"`): unknown field `memry`"),
        ("vcpus = 1\nmemory = \"2X\"", "m.toml, line 2 (`memory = \"2X\"`): `2X` is not a size"),
        ("serial = \"tcp:1\"", "pty:PATH"),
        ("memory_backing = \"shared\"", "unknown variant `shared`"),
        ("[[disk]]\nid = \"a\"\npath = \"b\"\nmode = \"ro\"", "unknown field `mode`"),
        ("vcpus = \"many\"", "line 1"),
        ("", "kernel: nothing to boot"),
        ("kernel = \"k\"\nguest = \"writer\"", "guest: a machine boots a kernel or a built-in guest"),
        ("guest = \"writer\"\nname = \"a/b\"", "name: "),
        ("guest = \"writer\"\nname = \"..\"", "name: "),
        ("guest = \"writer\"\nvcpus = 0", "vcpus: 0 is not between 1 and 254"),
        ("guest = \"writer\"\nmemory = \"1M\"", "memory: 1M is not between 4M and 4T"),
        ("guest = \"writer\"\nmemory = \"4194305\"", "memory: 4194305 is not a whole number of 4K pages"),
        ("guest = \"writer\"\nhuge_pages = true\nmemory = \"5M\"", "whole number of 2M pages"),
        ("guest = \"writer\"\ncmdline = \"quiet\"", "cmdline: needs a kernel"),
        ("guest = \"writer\"\ninitrd = \"i\"", "initrd: needs a kernel"),
        ("kernel = \"k\"\n[writer]\nseed = 1", "writer: these settings need guest = \"writer\""),
        ("guest = \"writer\"\ndirty_tracking = \"ring\"", "dirty_tracking: machines track writes by KVM's bitmap only"),
        ("guest = \"writer\"\n[balloon]\nsize = \"1G\"", "unknown field `size`"),
        ("guest = \"writer\"\n[[disk]]\nid = \"a b\"\npath = \"b\"", "disk: id \"a b\": use 1 to 20 letters"),
        ("guest = \"writer\"\n[[disk]]\nid = \"a\"\npath = \"\"", "disk: `a` needs a path"),
        (
            "guest = \"writer\"\n[[disk]]\nid = \"a\"\npath = \"x\"\n[[disk]]\nid = \"a\"\npath = \"y\"",
            "disk: id `a` occurs more than once",
        ),
        (
            "guest = \"writer\"\n[[disk]]\nid = \"a\"\npath = \"x\"\n[[disk]]\nid = \"b\"\npath = \"x\"\nreadonly = true",
            "disk: `a` and `b` are both x",
        ),
        (
            "guest = \"writer\"\n[[net]]\nid = \"a\"\ntap = \"b\"\nmac = \"01:00:00:00:00:01\"",
            "net: `a`: `01:00:00:00:00:01` is not the hardware address",
        ),
        (
            "guest = \"writer\"\n[[net]]\nid = \"a\"\ntap = \"x/y\"\nmac = \"02:00:00:00:00:01\"",
            "net: `a`: \"x/y\" cannot be the name of a tap device",
        ),
    ];
    for (text, expected) in cases {
        let error = parse(text).expect_err(text).to_string();
        assert!(error.contains(expected), "{expected:?} in {error:?}");
        assert!(!error.contains('\n'), "one line: {error:?}");
    }
    let error = MachineConfig::from_file(Path::new("/nonexistent/m.toml")).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/m.toml"), "{error}");
}

#[test]
fn interfaces_share_neither_taps_nor_addresses() {
    let net = |id: &str, tap: &str, mac: &str| NetConfig { id: id.into(), tap: tap.into(), mac: mac.into() };
    let with = |second| MachineConfig {
        guest: Some(GuestKind::Writer),
        nets: vec![net("a", "tap0", "52:54:00:00:00:0a"), second],
        ..Default::default()
    };
    with(net("b", "tap1", "52:54:00:00:00:0b")).validate().unwrap();
    let same_tap = with(net("b", "tap0", "52:54:00:00:00:0b")).validate().unwrap_err().to_string();
    assert!(same_tap.contains("the tap tap0 already"), "{same_tap}");
    let same_mac = with(net("b", "tap1", "52:54:00:00:00:0A")).validate().unwrap_err().to_string();
    assert!(same_mac.contains("already belongs to another interface"), "{same_mac}");
}

#[test]
fn there_is_room_for_so_many_devices_and_no_more() {
    let disk =
        |number: usize| DiskConfig { id: format!("d{number}"), path: format!("/d{number}").into(), readonly: false };
    let with = |count| MachineConfig {
        guest: Some(GuestKind::Writer),
        disks: (0..count).map(disk).collect(),
        ..Default::default()
    };
    with(MAX_DEVICES).validate().unwrap();
    let error = with(MAX_DEVICES + 1).validate().unwrap_err().to_string();
    assert!(error.contains("16 disks and network interfaces; a machine has at most 15"), "{error}");
    let with_balloon = |count| MachineConfig { balloon: Some(BalloonConfig::default()), ..with(count) };
    with_balloon(MAX_DEVICES - 1).validate().unwrap();
    let error = with_balloon(MAX_DEVICES).validate().unwrap_err().to_string();
    assert!(error.contains("a machine with a balloon has at most 14"), "{error}");
}

#[test]
fn paths_of_disks_are_made_absolute() {
    let disk = |path: &str| DiskConfig { id: "root".into(), path: path.into(), readonly: false };
    let mut config = MachineConfig { disks: vec![disk("images/root.img"), disk("/srv/a.img")], ..Default::default() };
    config.make_disk_paths_absolute().unwrap();
    let here = std::env::current_dir().unwrap();
    assert_eq!(config.disks, [disk(here.join("images/root.img").to_str().unwrap()), disk("/srv/a.img")]);
}

proptest! {
    #[test]
    fn a_serial_target_reads_back(kind in 0usize..5, path in "[a-z:/]{1,12}") {
        let path = PathBuf::from(path);
        let target = match kind {
            0 => SerialTarget::None,
            1 => SerialTarget::Stdio,
            2 => SerialTarget::Pty(path),
            3 => SerialTarget::Unix(path),
            _ => SerialTarget::File(path),
        };
        prop_assert_eq!(target.to_string().parse(), Ok(target));
    }

    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,80}", key in "[a-z]{1,8}") {
        let _ = parse(&text);
        let _ = parse(&format!("{key} = {text}"));
    }
}
