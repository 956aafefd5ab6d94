//! What the lab shows: whoever is connected to a machine stays connected while it moves between two hosts.
//!
//! The machine is `fw1`, a firewall: a public client pings it and holds a connection that is forwarded through it to a
//! private client, and it writes records to its disk. Everything is measured at the clients, from outside.
//!
//! | module | what |
//! |---|---|
//! | [`place`] | sockets that live in a network namespace |
//! | [`ping`], [`gap`] | echo requests, and the longest interval between replies |
//! | [`counting`] | a TCP connection that counts in both directions |
//! | [`guest`], [`record`], [`records`] | what the program in `fw1` answers; the records that it writes |
//! | [`capture`], [`announce`] | frames captured; what announces `fw1` on the public network |
//! | [`offset`] | clocks compared over the network |
//! | [`klog`] | warnings in a kernel log, compared with a control's |
//! | [`image`] | a disk image checked after power-off |
//! | [`verdict`] | all of this judged |
//! | [`stage`] | the machine on the lab's hosts: who keeps it, and its moves |
//! | [`run`], [`cases`] | the scenario, and what must not happen |
//! | [`claims`], [`race`] | who has the machine while the NFS server comes and goes |
//! | [`free_pages`] | what it costs to move memory that the guest has used and freed |
//! | [`outage`] | the NFS server away for a while |

pub mod announce;
pub mod capture;
pub mod cases;
pub mod claims;
pub mod counting;
pub mod free_pages;
pub mod gap;
pub mod guest;
pub mod image;
pub mod klog;
pub mod offset;
pub mod outage;
pub mod ping;
pub mod place;
pub mod race;
pub mod record;
pub mod records;
pub mod run;
pub mod stage;
pub mod verdict;
