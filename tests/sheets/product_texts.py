"""Product texts in the tongues of small sheets, one a line, written for the tests: what a seller types in a cell."""

SIMPLIFIED_CHINESE = """
不锈钢保温杯 大容量男女学生便携水杯
陶瓷马克杯 北欧风ins情侣对杯
实木书桌 简约现代家用学习桌 带抽屉
加厚收纳箱 特大号 衣服整理箱 带轮子
儿童积木玩具 益智拼装 3-6岁
家用电热水壶 304不锈钢 自动断电
折叠椅子 户外便携钓鱼凳 写生椅
真皮钱包男士短款 头层牛皮
LED护眼台灯 宿舍卧室床头灯
蓝牙音箱 低音炮 家用小型音响
宠物猫窝 四季通用 可拆洗
铁艺花架 阳台置物架 多层
玻璃花瓶 透明水培 客厅插花摆件
棉麻抱枕套 沙发靠垫 不含芯
厨房刀架 多功能置物架 壁挂式
竹制砧板 防霉菜板 家用
行李箱 万向轮 20寸登机箱
雨伞 全自动 晴雨两用 防晒
瑜伽垫 加宽加长 防滑
电脑显示器增高架 桌面收纳
毛绒玩具熊 抱枕公仔 生日礼物
浴室防滑垫 淋浴 吸盘
塑料垃圾桶 大号 无盖
床上四件套 全棉 1.8米床
手工编织竹篮 水果篮
紫砂壶 宜兴 原矿 纯手工
车载手机支架 出风口 通用
木质相框 7寸 挂墙 创意
鞋柜 进门口 超薄 翻斗
燃气灶 双灶 台式 嵌入式
窗帘 遮光布 成品 卧室
折叠桌，可升降，圆形
米桶 防潮 密封 20斤装
砂锅 炖锅 耐高温 煲汤
工艺品摆件：招财猫
镜子 化妆镜 高清 台式
饼干盒（密封罐）铁盒
笔筒，学生用品，简约
帐篷 户外 3-4人 防暴雨
地毯 客厅 茶几毯 短绒
""".strip().split("\n")

TRADITIONAL_CHINESE = """
不鏽鋼保溫杯 大容量 隨身杯
陶瓷馬克杯 北歐風 情侶對杯
實木書桌 簡約現代 附抽屜
加厚收納箱 特大號 附滑輪
兒童積木玩具 益智拼裝
快煮壺 304不鏽鋼 自動斷電
摺疊椅 戶外 露營 釣魚椅
真皮皮夾 男用短夾 頭層牛皮
LED護眼檯燈 宿舍床頭燈
藍牙喇叭 重低音 家用
寵物貓窩 四季通用 可拆洗
鐵製花架 陽台置物架
玻璃花瓶 透明 客廳擺飾
棉麻抱枕套 沙發靠墊
廚房刀架 壁掛式 多功能
竹製砧板 防霉菜板
行李箱 萬向輪 20吋登機箱
自動雨傘 晴雨兩用 防曬
瑜珈墊 加寬加長 止滑
螢幕增高架 桌面收納
絨毛玩具熊 生日禮物
浴室止滑墊 吸盤
塑膠垃圾桶 大號
床包四件組 純棉 雙人
手工編織竹籃 水果籃
紫砂壺 宜興 純手工
車用手機架 出風口
木質相框 掛牆 創意
鞋櫃 玄關 超薄
瓦斯爐 雙口 檯面式
窗簾 遮光 臥室
摺疊桌，可升降，圓形
米桶 防潮 密封
砂鍋 燉鍋 耐高溫
招財貓 開運擺飾
化妝鏡 桌上型
餅乾盒（密封罐）
筆筒，文具，學生用品
帳篷 戶外 3-4人
地毯 客廳 短毛
""".strip().split("\n")

JAPANESE = """
ステンレスマグカップ 保温 保冷
陶器の湯呑み 和風 ペア
木製デスク 引き出し付き 学習机
収納ボックス フタ付き 大容量
積み木 知育玩具 3歳から
電気ケトル 自動電源オフ
折りたたみ椅子 アウトドア
本革財布 メンズ 二つ折り
LEDデスクライト 目に優しい
ワイヤレススピーカー 重低音
猫用ベッド 洗える 丸型
スチールラック 5段 棚
花瓶 ガラス 透明 北欧
クッションカバー 綿麻 無地
包丁スタンド キッチン収納
まな板 竹製 抗菌
スーツケース 機内持ち込み
折りたたみ傘 自動開閉 晴雨兼用
ヨガマット 厚手 滑り止め
モニター台 机上 収納
ぬいぐるみ くま 誕生日プレゼント
バスマット 珪藻土 速乾
ゴミ箱 ふた付き 45リットル
布団カバーセット シングル
竹かご 手編み 果物入れ
急須 常滑焼 日本製
スマホスタンド 車載用
写真立て 木製 壁掛け
シューズラック 薄型 玄関
ガスコンロ 二口 据え置き
遮光カーテン 1級 2枚組
こたつテーブル 円形
米びつ 10kg 密閉
土鍋 ご飯炊き 二合
招き猫 置物 縁起物
卓上ミラー 拡大鏡付き
缶ケース（クッキー入れ）
ペン立て、文房具、事務用品
テント 防水 3〜4人用
ラグ 洗える 長方形 ホットカーペット対応
""".strip().split("\n")

KOREAN = """
스테인리스 머그컵 보온 보냉
도자기 찻잔 세트 선물용
원목 책상 서랍형 학생용
수납함 대용량 뚜껑 포함
어린이 블록 장난감 3세 이상
전기 주전자 자동 전원 차단
접이식 의자 캠핑 낚시
남성 가죽 지갑 반지갑
LED 스탠드 조명 책상용
블루투스 스피커 저음 강화
고양이 방석 사계절 세탁 가능
철제 선반 5단 베란다
유리 꽃병 투명 인테리어
쿠션 커버 면 린넨
주방 칼꽂이 벽걸이
대나무 도마 항균
여행용 캐리어 20인치
자동 우산 양산 겸용
요가 매트 두꺼운 미끄럼 방지
모니터 받침대 수납형
곰 인형 생일 선물
욕실 매트 규조토
휴지통 뚜껑형 대형
이불 커버 세트 퀸
수공예 바구니 과일용
다기 세트 전통
차량용 휴대폰 거치대
나무 액자 벽걸이
신발장 슬림 현관
가스레인지 2구
암막 커튼 침실
접이식 테이블 원형
쌀통 밀폐 10kg
뚝배기 냄비 내열
고양이 장식품, 행운
탁상용 거울 확대경
쿠키 상자 (밀폐 용기)
연필꽂이, 문구, 사무용
텐트 방수 4인용
거실 카펫 단모
""".strip().split("\n")

WESTERN = """
Edelstahlbecher für unterwegs, isoliert
Bücherregal aus Kiefernholz, weiß
Küchenbrett aus Bambus, groß
Faltbarer Hocker fürs Gästezimmer
Übertopf aus Keramik – grün
Schöne Tischlampe mit Stoffschirm
Schlüsselbrett für den Flur
Spülbürste mit Holzgriff
Größe M, wärmende Wolldecke
Kissenhülle „Frühling“, 2 Stück
Couchtisch, höhenverstellbar, Eiche geölt
Türstopper in Bärenform
Tasse à café en porcelaine
Étagère murale en chêne massif
Boîte de rangement avec couvercle, très grande
Chaise pliante légère pour l'extérieur
Vase en verre transparent, décoration intérieure
Théière en fonte émaillée
Housse de coussin brodée à la main
Porte-manteau d’entrée, métal doré
Fauteuil à bascule pour bébé
Meuble télé, façade laquée
Taza de cerámica pintada a mano
Estantería de madera, diseño nórdico
Cojín pequeño para niños
Lámpara de pie con pantalla de algodón
Caja de almacenaje plástica, tamaño grande
Sillón reclinable, tapicería gris
Tazza da tè, qualità superiore
Scaffale per libri, è facile da montare
Vaso di vetro, più resistente
Chávena de café em porcelana
Cadeira de jardim dobrável, não enferruja
Caixa de arrumação com tampa, algodão
Förvaringslåda med lock, grå
Soffbord i björk, lätt att flytta
Håndlavet kop i grøn keramik
Børnestol af træ
Theeglas met schotel, geïsoleerd
Koffiebeker van porselein, één stuk
""".strip().split("\n")

CYRILLIC = """
Кружка из нержавеющей стали
Чашка фарфоровая с блюдцем
Письменный стол, массив дуба
Ящик для хранения с крышкой
Детский конструктор от 3 лет
Электрический чайник 1,7 л
Складной стул для рыбалки
Кошелёк мужской кожаный
Настольная лампа светодиодная
Беспроводная колонка
Лежанка для кошки, съёмный чехол
Стеллаж металлический, 5 полок
Ваза стеклянная прозрачная
Наволочка декоративная, лён
Подставка для ножей
Разделочная доска из бамбука
Чемодан на колёсах, ручная кладь
Зонт автоматический складной
Коврик для йоги нескользящий
Подставка под монитор
Плюшевый медведь, подарок
Коврик для ванной
Мусорное ведро с крышкой
Комплект постельного белья
Плетёная корзина для фруктов
Заварочный чайник, глина
Держатель для телефона в машину
Рамка для фото, дерево
Обувница узкая в прихожую
Плита газовая настольная
Шторы плотные, 2 шт.
Стол раскладной круглый
Ёмкость для круп
Кастрюля глиняная
Статуэтка «Кошка на счастье»
Зеркало настольное с подсветкой
Банка для печенья (жесть)
Органайзер для канцелярии
Палатка туристическая – 4 места
Ковёр в гостиную
""".strip().split("\n")

CENTRAL_EUROPEAN = """
Kubek termiczny ze stali nierdzewnej, duży
Półka na książki, sosna
Deska do krojenia z bambusa, gruba, łatwa w myciu
Składane krzesło turystyczne na ryby
Doniczka ceramiczna – zielona, średnia
Lampa stołowa z materiałowym kloszem, ciepłe światło
Wieszak ścienny do przedpokoju
Pudełko do przechowywania z pokrywką, przeźroczyste
Poszewka na poduszkę, haftowana ręcznie
Dzbanek żeliwny do herbaty, emaliowany w środku
Łóżeczko dziecięce, białe
Stolik kawowy, dąb olejowany
Hrnek z nerezové oceli, velký
Dřevěná police na knihy, bílá
Skládací židle na ryby
Úložný box s víkem, průhledný
Skleněná váza, čirá
Stolní lampa s látkovým stínidlem
Dětská postýlka, masivní dřevo
Povlak na polštář, ručně vyšívaný
Konferenční stolek, olejovaný dub
Květináč keramický, zelený
Rozsdamentes acél bögre, nagy méretű
Könyvespolc tömör fenyőből
Összecsukható szék horgászathoz
Tárolódoboz fedővel, átlátszó
Üvegváza, színtelen, kézzel fújt
Asztali lámpa szövetbúrával, meleg fényű
Gyerekágy tömörfából, fehér
Díszpárnahuzat, kézi hímzésű
Cană din oţel inoxidabil, mare
Raft de cărţi din lemn de brad
Cutie de depozitare cu capac, încăpătoare
Scaun pliant pentru grădină, uşor
Šalica od nehrđajućeg čelika
Drvena polica za knjige, bijela, široka
Sklopiva stolica za ribolov, čvrsta
Skodelica za čaj, ročno poslikana
Drevená polica na knihy, svetlý dub, ľahká montáž
Skladacia stolička do záhrady, sivá, pevný kĺb
""".strip().split("\n")
