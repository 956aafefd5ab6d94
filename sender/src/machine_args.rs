//! Options that describe a machine, laid over its file.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use godwit_vmm::MachineConfig;
use godwit_vmm::config::{
    BalloonConfig, ByteSize, DirtyTracking, DiskConfig, GuestKind, MemoryBacking, NetConfig, SerialTarget,
};
use godwit_vmm::workload::{Contents, Order, Rate, WriteUnit, WriterConfig};
use serde::de::DeserializeOwned;
use serde::de::value::{Error as ValueError, StrDeserializer};

/// Options that describe a machine. What is not given stays as the file has it.
#[derive(Debug, Clone, Args)]
pub(crate) struct MachineArgs {
    /// Name of the machine, also of its control socket
    #[arg(long, help_heading = "Machine")]
    pub(crate) name: Option<String>,
    /// Size of RAM: 512M, 2G (binary)
    #[arg(long, value_name = "SIZE", help_heading = "Machine")]
    memory: Option<ByteSize>,
    /// What RAM is made of: private, memfd
    #[arg(long, value_name = "KIND", value_parser = named::<MemoryBacking>, help_heading = "Machine")]
    memory_backing: Option<MemoryBacking>,
    /// Take RAM from the host's reserve of huge pages
    #[arg(long, help_heading = "Machine")]
    huge_pages: bool,
    /// How the guest's writes are tracked: bitmap, ring
    #[arg(long, value_name = "HOW", value_parser = named::<DirtyTracking>, help_heading = "Machine")]
    dirty_tracking: Option<DirtyTracking>,
    /// Number of vCPUs
    #[arg(long, value_name = "N", help_heading = "Machine")]
    vcpus: Option<u32>,
    /// Kernel: bzImage, vmlinux or any PVH ELF
    #[arg(long, value_name = "FILE", conflicts_with = "guest", help_heading = "Machine")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", help_heading = "Machine")]
    cmdline: Option<String>,
    /// Serial port: none, stdio, pty:PATH, unix:PATH, file:PATH
    #[arg(long, value_name = "TARGET", help_heading = "Machine")]
    pub(crate) serial: Option<SerialTarget>,
    /// Let the guest give back memory that it does not use: a memory balloon with free page reporting
    #[arg(long, help_heading = "Machine")]
    balloon: bool,
    /// Disk: id=NAME,path=FILE[,readonly]; may be given several times
    #[arg(long = "disk", value_name = "DISK", value_parser = disk, help_heading = "Machine")]
    disks: Vec<DiskConfig>,
    /// Let disks go through the host's page cache, which may be stale after a move
    #[arg(long, help_heading = "Machine")]
    unsafe_cache: bool,
    /// Network interface: id=NAME,tap=DEVICE,mac=ADDRESS; may be given several times
    #[arg(long = "net", value_name = "NET", value_parser = net, help_heading = "Machine")]
    nets: Vec<NetConfig>,
    /// Run a built-in guest: writer
    #[arg(long, value_name = "GUEST", value_parser = named::<GuestKind>, help_heading = "Workload guest")]
    guest: Option<GuestKind>,
    /// Memory that it rewrites over and over
    #[arg(long, value_name = "SIZE", help_heading = "Workload guest")]
    guest_working_set: Option<ByteSize>,
    /// Page writes per second, the total over its vCPUs, or `max`
    #[arg(long, value_name = "RATE", help_heading = "Workload guest")]
    guest_rate: Option<Rate>,
    /// In which order: seq, random, hot-cold
    #[arg(long, value_name = "ORDER", help_heading = "Workload guest")]
    guest_order: Option<Order>,
    /// How much of a page one write changes: word, page
    #[arg(long, value_name = "UNIT", help_heading = "Workload guest")]
    guest_write: Option<WriteUnit>,
    /// What pages hold: random, compressible
    #[arg(long, value_name = "KIND", help_heading = "Workload guest")]
    guest_contents: Option<Contents>,
    /// Memory that it fills with contents at boot
    #[arg(long, value_name = "SIZE", help_heading = "Workload guest")]
    guest_fill: Option<ByteSize>,
    /// Seed of contents and orders
    #[arg(long, value_name = "N", help_heading = "Workload guest")]
    guest_seed: Option<u64>,
}

impl MachineArgs {
    /// Lays the options over `config`.
    pub(crate) fn apply(&self, config: &mut MachineConfig) {
        set(&mut config.name, &self.name);
        set(&mut config.memory, &self.memory);
        set(&mut config.memory_backing, &self.memory_backing);
        config.huge_pages |= self.huge_pages;
        set(&mut config.dirty_tracking, &self.dirty_tracking);
        set(&mut config.vcpus, &self.vcpus);
        set(&mut config.serial, &self.serial);
        config.unsafe_cache |= self.unsafe_cache;
        if self.balloon {
            config.balloon = Some(BalloonConfig::default());
        }
        if !self.disks.is_empty() {
            config.disks.clone_from(&self.disks);
        }
        if !self.nets.is_empty() {
            config.nets.clone_from(&self.nets);
        }
        self.apply_boot(config);
        self.apply_writer(config);
    }

    /// A kernel takes the place of the file's built-in guest, and the other way round.
    fn apply_boot(&self, config: &mut MachineConfig) {
        if self.kernel.is_some() {
            config.kernel.clone_from(&self.kernel);
            config.guest = None;
            config.writer = None;
        }
        if self.guest.is_some() {
            config.guest = self.guest;
            config.kernel = None;
            config.initrd = None;
            config.cmdline.clear();
        }
        if self.initrd.is_some() {
            config.initrd.clone_from(&self.initrd);
        }
        set(&mut config.cmdline, &self.cmdline);
    }

    fn apply_writer(&self, config: &mut MachineConfig) {
        let mut writer = config.writer.clone().unwrap_or_default();
        set(&mut writer.working_set_bytes, &self.guest_working_set.map(ByteSize::bytes));
        set(&mut writer.fill_bytes, &self.guest_fill.map(ByteSize::bytes));
        set(&mut writer.rate, &self.guest_rate);
        set(&mut writer.order, &self.guest_order);
        set(&mut writer.write, &self.guest_write);
        set(&mut writer.contents, &self.guest_contents);
        set(&mut writer.seed, &self.guest_seed);
        // Settings without the guest are left for validation to refuse.
        if config.writer.is_some() || config.guest.is_some() || writer != WriterConfig::default() {
            config.writer = Some(writer);
        }
    }
}

fn set<T: Clone>(value: &mut T, given: &Option<T>) {
    if let Some(given) = given {
        value.clone_from(given);
    }
}

/// Reads a choice by the name that it has in a machine file.
fn named<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    T::deserialize(StrDeserializer::<ValueError>::new(text)).map_err(|error| error.to_string())
}

fn disk(text: &str) -> Result<DiskConfig, String> {
    let mut fields = Fields::parse(text)?;
    let readonly = fields.flag("readonly");
    let disk = DiskConfig { id: fields.take("id")?, path: fields.take::<PathBuf>("path")?, readonly };
    fields.end("id=NAME,path=FILE[,readonly]").map(|()| disk)
}

fn net(text: &str) -> Result<NetConfig, String> {
    let mut fields = Fields::parse(text)?;
    let net = NetConfig { id: fields.take("id")?, tap: fields.take("tap")?, mac: fields.take("mac")? };
    fields.end("id=NAME,tap=DEVICE,mac=ADDRESS").map(|()| net)
}

/// `key=value` and bare words between commas.
struct Fields<'a>(Vec<(&'a str, Option<&'a str>)>);

impl<'a> Fields<'a> {
    fn parse(text: &'a str) -> Result<Self, String> {
        let fields: Vec<_> = text
            .split(',')
            .map(|field| field.split_once('=').map_or((field, None), |(key, value)| (key, Some(value))))
            .collect();
        match fields.iter().enumerate().find(|(index, (key, _))| fields[..*index].iter().any(|(other, _)| other == key))
        {
            Some((_, (key, _))) => Err(format!("`{key}` is given twice")),
            None => Ok(Fields(fields)),
        }
    }

    fn take<T: FromStr>(&mut self, key: &str) -> Result<T, String> {
        let index =
            self.0.iter().position(|(name, value)| *name == key && value.is_some_and(|value| !value.is_empty()));
        let (_, value) = self.0.remove(index.ok_or_else(|| format!("`{key}=…` is missing"))?);
        value.unwrap_or_default().parse().map_err(|_| format!("`{key}` cannot be read"))
    }

    fn flag(&mut self, name: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|field| *field != (name, None));
        self.0.len() < before
    }

    fn end(self, form: &str) -> Result<(), String> {
        match self.0.first() {
            Some((key, _)) => Err(format!("`{key}` is unknown; the form is {form}")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Given {
        #[command(flatten)]
        machine: MachineArgs,
    }

    fn laid_over(file: &str, options: &[&str]) -> MachineConfig {
        let mut config = MachineConfig::from_toml(file, "test").unwrap();
        let given = Given::try_parse_from([&["run"], options].concat()).unwrap();
        given.machine.apply(&mut config);
        config
    }

    #[test]
    fn options_win_over_the_file_and_the_rest_stays() {
        let file = "memory = '2G'\nvcpus = 3\nguest = 'writer'\n[writer]\nseed = 9\n";
        let config = laid_over(file, &["--memory", "512M", "--guest-rate", "max"]);
        assert_eq!((config.memory, config.vcpus), (ByteSize(512 << 20), 3));
        let writer = config.writer.unwrap();
        assert_eq!((writer.seed, writer.rate), (9, Rate::Max));
    }

    #[test]
    fn a_balloon_is_there_if_the_file_or_an_option_says_so() {
        let reports = |file: &str, options: &[&str]| {
            let config = laid_over(&format!("guest = 'writer'\n{file}"), options);
            config.balloon.map(|balloon| balloon.free_page_reporting)
        };
        assert_eq!(reports("", &[]), None);
        assert_eq!(reports("[balloon]\n", &[]), Some(true));
        assert_eq!(reports("", &["--balloon"]), Some(true));
        assert_eq!(reports("[balloon]\nfree_page_reporting = false\n", &[]), Some(false));
        assert_eq!(reports("[balloon]\nfree_page_reporting = false\n", &["--balloon"]), Some(true));
    }

    #[test]
    fn a_kernel_takes_the_place_of_the_files_guest() {
        let config = laid_over("guest = 'writer'\n[writer]\nseed = 9\n", &["--kernel", "/boot/vmlinuz"]);
        assert_eq!((config.guest, config.writer), (None, None));
        let config = laid_over("kernel = '/boot/vmlinuz'\ncmdline = 'quiet'\n", &["--guest", "writer"]);
        assert_eq!((config.kernel.as_ref(), config.cmdline.as_str()), (None, ""));
        assert!(config.validate().is_ok());
    }

    #[test]
    fn settings_of_a_guest_that_is_not_there_are_refused() {
        let config = laid_over("kernel = '/boot/vmlinuz'\n", &["--guest-rate", "5"]);
        assert!(config.validate().is_err());
    }

    #[test]
    fn disks_and_interfaces_are_read_field_by_field() {
        let root = disk("id=root,path=/a=b.raw,readonly").unwrap();
        assert_eq!((root.path, root.readonly), (PathBuf::from("/a=b.raw"), true));
        assert!(disk("id=root").unwrap_err().contains("path"));
        assert!(disk("id=root,path=/a,colour=red").unwrap_err().contains("colour"));
        assert!(disk("id=a,id=b,path=/a").unwrap_err().contains("twice"));
        assert_eq!(net("id=n,tap=tap0,mac=52:54:00:00:00:01").unwrap().mac, "52:54:00:00:00:01");
    }

    #[test]
    fn choices_are_named_when_none_fits() {
        assert!(named::<MemoryBacking>("hugetlb").unwrap_err().contains("private"));
        assert_eq!(named::<GuestKind>("writer"), Ok(GuestKind::Writer));
    }
}
