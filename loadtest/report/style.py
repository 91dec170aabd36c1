"""The page's rules; colours are variables, which `tones` sets for a light and a dark page."""

RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main,header,footer{max-width:1480px;margin:0 auto;padding:0 24px}
header{padding-top:28px}
h1{font-size:26px;margin:0 0 2px;overflow-wrap:anywhere}
h2{font-size:19px;margin:36px 0 10px}
h3{font-size:15px;margin:0 0 4px}
p{margin:4px 0;max-width:90ch}
.muted,.note,footer,dt{color:var(--muted)}
.note,footer,dt{font-size:13px}
a{color:var(--blue)}
a:focus-visible,summary:focus-visible,[tabindex]:focus-visible{outline:2px solid var(--blue);outline-offset:2px}
.skip{position:absolute;left:-999px}
.skip:focus{left:8px;top:8px;background:var(--page);padding:6px 10px}
nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;padding:0;margin:14px 0 0;font-size:14px}
.banner{margin:16px 0 0;padding:10px 14px;border-left:4px solid var(--green);background:var(--panel)}
.banner.bad{border-color:var(--red)}
.banner strong{color:var(--green)}
.banner.bad strong{color:var(--red)}
.banner ul{margin:4px 0 0;padding-left:20px;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:18px 0 0}
.tiles div{background:var(--panel);border-radius:8px;padding:12px 14px}
.tiles dd{margin:0;font-size:13px;color:var(--muted)}
.tiles dd.figure{font-size:25px;line-height:1.3;color:var(--ink);font-variant-numeric:tabular-nums}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:14px}
.figures+.scroll{margin-top:20px}
figure{margin:0;background:var(--panel);border-radius:8px;padding:14px 14px 10px;min-width:0}
svg{display:block;width:100%;height:auto;margin:4px 0}
.l{fill:none;stroke-linejoin:round}
.a{fill-opacity:.28}
.o{fill:var(--panel);stroke-width:1.5}
.t{font:12px system-ui,sans-serif}
.halo{paint-order:stroke;stroke:var(--panel);stroke-width:4px}
.h{fill:var(--ink);fill-opacity:0}
.h:hover{fill-opacity:.07}
details{font-size:13px}
summary{cursor:pointer;color:var(--muted)}
.scroll{overflow-x:auto;max-height:70vh}
details .scroll{max-height:320px;overflow:auto;margin-top:6px}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
details table{font-size:12px}
caption{text-align:left;color:var(--muted);font-size:13px;padding-bottom:4px;max-width:90ch}
th,td{padding:5px 12px;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal;overflow-wrap:anywhere}
th:first-child,td:first-child{min-width:14ch;max-width:44ch}
thead th{color:var(--muted);font-weight:500}
tbody th{font-weight:400}
.words td,.words th{text-align:left;white-space:normal;overflow-wrap:anywhere}
.worse,.invalid,.broke{color:var(--red);font-weight:600}
.better,.held{color:var(--green);font-weight:600}
.unclear{color:var(--orange);font-weight:600}
.same{color:var(--muted)}
footer{padding-top:36px;padding-bottom:36px}
@media print{
 body{font-size:12px}
 nav,details,.skip{display:none}
 figure,tr,.tiles div{break-inside:avoid}
 .scroll{overflow:visible;max-height:none}
 .figures{grid-template-columns:1fr 1fr}
 th,td{padding:3px 6px;font-size:11px}
}
"""
