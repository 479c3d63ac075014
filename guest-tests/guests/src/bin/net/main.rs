//! Answers ARP, pings and UDP datagrams, and may send numbered ones. See `guests::net`.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "memory that devices write")]

extern crate alloc;

mod device;

use alloc::vec;
use core::iter;

use guests::bare::boot::Boot;
use guests::bare::console::{Console, Timing};
use guests::bare::timer::Timer;
use guests::bare::waiter::{Waiter, Watchdog};
use guests::bare::{give_up, heap, power, serial, tsc, virtio};
use guests::mmio::Wait;
use guests::net::{Endpoint, Network, Numbered, Options, Report, command};
use guests::{Hex, Maybe};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::udp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, IpEndpoint};
use virtio_drivers::transport::DeviceType;

use crate::device::Nic;

guests::guest!(pvh, main);

/// Datagrams that a socket keeps, each way.
const DATAGRAMS: usize = 64;
/// µs between two looks whether the device wants an announcement, besides its interrupt.
const LOOK_US: u64 = 50_000;

fn main(boot: &Boot) -> ! {
    heap::start(boot, begin)
}

extern "C" fn begin(boot: &Boot) -> ! {
    let options = match Options::parse(boot.command_line()) {
        Ok(options) => options,
        Err(reason) => give_up(&reason),
    };
    let Some(khz) = tsc::frequency(options.tsc_khz) else {
        give_up(&"no source for the TSC's frequency: give tsc_khz=");
    };
    let Some(device) = virtio::devices(boot, &[DeviceType::Network])
        .into_iter()
        .next()
    else {
        give_up(&"the command line names no virtio-net device");
    };
    let window = device.window;
    let mut nic = match Nic::start(device, &options) {
        Ok(nic) => nic,
        Err(reason) => give_up(&reason),
    };
    if options.wait == Wait::Poll {
        nic.refuse_interrupts();
    }
    let waiter = Waiter::new(options.wait, iter::once(window.irq));
    serial::line(&Report::Ready {
        address: window.base,
        mac: nic.mac,
        ip: options.ip,
        announce: nic.announces(),
        wait: options.wait,
        features: Hex(nic.features),
        tsc_khz: khz,
    });
    Guest::new(options, khz, nic).run(waiter)
}

struct Guest {
    options: Options,
    khz: u64,
    nic: Nic,
    interface: Interface,
    sockets: SocketSet<'static>,
    echo: SocketHandle,
    sender: SocketHandle,
    begin: u64,
    echoed: u64,
    numbered: u64,
    skipped: u64,
    announced: u64,
    watchdog: Watchdog,
}

fn address(octets: [u8; 4]) -> IpAddress {
    let [a, b, c, d] = octets;
    IpAddress::v4(a, b, c, d)
}

fn socket(port: u16) -> udp::Socket<'static> {
    let buffer = || {
        udp::PacketBuffer::new(
            vec![udp::PacketMetadata::EMPTY; DATAGRAMS],
            vec![0; DATAGRAMS * 1500],
        )
    };
    let mut socket = udp::Socket::new(buffer(), buffer());
    if socket.bind(port).is_err() {
        give_up(&"port= can't be 0");
    }
    socket
}

impl Guest {
    fn new(options: Options, khz: u64, mut nic: Nic) -> Self {
        let begin = tsc::now();
        let config = Config::new(EthernetAddress(nic.mac.0).into());
        let mut interface = Interface::new(config, &mut nic, Instant::ZERO);
        let Network {
            address: own,
            prefix,
        } = options.ip;
        // The first address always has room.
        interface.update_ip_addrs(|addresses| {
            let _ = addresses.push(IpCidr::new(address(own.0), prefix));
        });
        let mut sockets = SocketSet::new(vec![]);
        let echo = sockets.add(socket(options.port));
        let sender = sockets.add(socket(options.port.wrapping_add(1).max(1)));
        Self {
            options,
            khz,
            nic,
            interface,
            sockets,
            echo,
            sender,
            begin,
            echoed: 0,
            numbered: 0,
            skipped: 0,
            announced: 0,
            watchdog: Watchdog::default(),
        }
    }

    fn run(&mut self, mut waiter: Waiter) -> ! {
        let mut console = Console::new(Timing {
            khz: self.khz,
            heartbeat_us: self.options.heartbeat,
            interval_ms: self.options.interval,
        });
        let cycles = |microseconds: u64| microseconds * self.khz / 1000;
        let mut send = Timer::new(cycles(self.options.every.max(1)));
        let mut look = Timer::new(cycles(LOOK_US));
        let mut latest = self.begin;
        // The first announcement is the guest's own: switches learn where it is.
        self.announce();
        loop {
            // Time does not go back for smoltcp, even if the TSC does.
            let now = tsc::now();
            latest = latest.max(now);
            let (status, byte) = console.turn(now);
            match byte {
                Some(command::QUIT) => power::off(),
                Some(command::RESET) => power::reset(),
                _ => {}
            }
            if status || byte == Some(command::STATUS) {
                self.report();
            }
            let mut changed = look.fires(latest, 0);
            let news = waiter.has_news(0);
            let here = !news && self.nic.has_frame();
            let news = self.watchdog.misses(latest, self.khz, news, here) || news;
            waiter.take_news();
            if news && self.options.wait == Wait::Irq {
                changed |= self.nic.acknowledge_interrupt();
            }
            if changed && self.nic.wants_announcement() {
                self.announce();
                self.nic.acknowledge_announcement();
                self.announced += 1;
                serial::line(&Report::Announced {
                    count: self.announced,
                });
            }
            let sends = self.options.to.0.is_some() && send.fires(latest, send.interval);
            if let (true, Maybe(Some(to))) = (sends, self.options.to) {
                self.send_number(latest, to);
            }
            if news || sends {
                let time = Instant::from_micros_const(self.microseconds(latest) as i64);
                self.interface.poll(time, &mut self.nic, &mut self.sockets);
                if self.echo() {
                    self.interface.poll(time, &mut self.nic, &mut self.sockets);
                }
            }
            waiter.wait();
        }
    }

    fn microseconds(&self, now: u64) -> u64 {
        let cycles = now.saturating_sub(self.begin);
        (u128::from(cycles) * 1000 / u128::from(self.khz)) as u64
    }

    /// Sends back what has come; whether anything has.
    fn echo(&mut self) -> bool {
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(self.echo);
        let before = self.echoed;
        while socket.can_send()
            && let Ok((data, from)) = socket.recv()
        {
            let data = data.to_vec();
            self.echoed += u64::from(socket.send_slice(&data, from.endpoint).is_ok());
        }
        self.echoed != before
    }

    fn send_number(&mut self, now: u64, to: Endpoint) {
        let numbered = Numbered {
            number: self.numbered + 1,
            sent_us: self.microseconds(now),
        };
        let mut datagram = vec![0; self.options.bytes.clamp(Numbered::BYTES as u64, 1400) as usize];
        datagram[..Numbered::BYTES].copy_from_slice(&numbered.to_bytes());
        let to = IpEndpoint::new(address(to.address.0), to.port);
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(self.sender);
        if socket.send_slice(&datagram, to).is_ok() {
            self.numbered += 1;
        } else {
            self.skipped += 1;
        }
    }

    /// Tells everybody in the network where the address is: an ARP request for itself.
    fn announce(&mut self) {
        let (mac, ip) = (self.nic.mac.0, self.options.ip.address.0);
        self.nic.send(42, |frame| {
            frame[..6].fill(0xff);
            frame[6..12].copy_from_slice(&mac);
            // Ethernet type ARP; Ethernet, IPv4, 6 and 4 bytes, request.
            frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
            frame[22..28].copy_from_slice(&mac);
            frame[28..32].copy_from_slice(&ip);
            frame[32..38].fill(0);
            frame[38..42].copy_from_slice(&ip);
        });
    }

    fn report(&self) {
        let counts = &self.nic.counts;
        serial::line(&Report::Status {
            received: counts.received,
            arp: counts.arp,
            icmp: counts.icmp,
            udp: counts.udp,
            other: counts.other,
            sent: counts.sent,
            echoed: self.echoed,
            numbered: self.numbered,
            skipped: self.skipped,
            announced: self.announced,
            in_flight: self.nic.in_flight() as u64,
            errors: counts.errors,
            lost_interrupts: self.watchdog.lost,
        });
    }
}
